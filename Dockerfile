# The image of a Ray node with ptxdist, for KubeRay (configs/rayjob.yaml) or other clusters of containers. In a checkout:
#
#   docker build --tag IMAGE .
#   docker push IMAGE
#
# torch brings the CUDA libraries. The node needs NVIDIA's driver and container toolkit. What was tried of this file, and
# what was not, is in docs/cluster.md.
FROM python:3.12-slim

# KubeRay's probes call wget.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*

# Into the Python of the image and not into an environment: KubeRay starts Ray in a login shell, which resets PATH.
WORKDIR /opt/ptxdist
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY configs configs
COPY pipelines pipelines
COPY ptxdist ptxdist
RUN pip install --no-cache-dir --root-user-action ignore --constraint constraints.txt '.[offline,s3]'

RUN useradd --create-home --uid 1000 ray
USER ray
WORKDIR /home/ray
RUN ptxdist --version && ray --version && wget --version
