"""Faults on several hosts: what a training says and does, how long it takes, and whether its weights stay the same.

    python tests/benchmarks/bench_hosts.py [CASE ...] > hosts.json

The hosts are network namespaces (tests/hosts.py), the cases those of tests/host_faults.py. Needs root. `noticed_s` is
the time from the fault to the first words about it, `again_s` to the first progress after it, `total_s` that of the
whole command.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from host_faults import ADDRESS, CASES, PTXDIST, UNDISTURBED, Scene, cluster_of_hosts, make_other, restart_ray, start
from hosts import NETWORK, wait_until

WORDS = ("--pipeline", "smoke", "--set", "stages.1.epochs=4", "--set", "stages.1.best_by=loss", "--workers", 2, "--set",
         "train.worker_timeout_s=10", "--set", "train.checkpoint_every_s=1")  # fmt: skip
REFUSED = ("another version", "no shared folder", "a clock 60 s off (doctor)")


def measure(name: str, scene: Scene) -> dict[str, object]:
    """Train with one fault in the third epoch of the first stage."""
    case, started = CASES[name], time.monotonic()
    place = start(scene, name, case, WORDS)
    wait_until(lambda: "epoch 2/4" in scene.words or not scene.goes_on(), 600, lambda: scene.words)
    scene.listen()
    hit = time.monotonic()
    case.fault(scene)
    found: dict[str, float] = {}
    while scene.goes_on():
        new = scene.news
        for key, pattern in (("noticed_s", "worker|collective|waiting"), ("again_s", "resumes after")):
            if key not in found and re.search(pattern, new):
                found[key] = round(time.monotonic() - hit, 1)
        time.sleep(0.1)
    assert scene.training is not None
    row: dict[str, object] = {"case": name, "code": scene.training.returncode, **found,
                              "total_s": round(time.monotonic() - started, 1)}  # fmt: skip
    case.after(scene)
    row["as_promised"] = scene.training.returncode == case.code and re.search(case.says, scene.words) is not None
    row["said"] = [line for line in scene.news.splitlines() if "epoch" not in line.split(":")[0]][-12:]
    if scene.training.returncode == 0:
        row["weights"] = scene.weights(place)
    return row


def refused(name: str, scene: Scene) -> dict[str, object]:
    """A command that ends before anything is trained, and what it says."""
    two, head = scene.at["two"], scene.at["head"]
    command = ("train", "--data", scene.work / "cache", "--run", scene.work / "refused" / "run", *WORDS)
    if name == "no shared folder":
        two.run("mount", "-t", "tmpfs", "tmpfs", scene.work)
    elif name == "another version":
        restart_ray(scene, make_other(scene.work / "version", version="9.9.9"))
    else:
        restart_ray(scene, make_other(scene.work / "clock", clock_s=60))
        command = ("doctor", "--address", ADDRESS, "--run", scene.work / "refused")
    started = time.monotonic()
    done = head.run(*PTXDIST, *command, check=False)
    took_s = time.monotonic() - started
    if name == "no shared folder":
        two.run("umount", scene.work)
    else:
        restart_ray(scene, {})
    said = [line for line in (done.stdout + done.stderr).splitlines() if f"{NETWORK}.3" in line or "error" in line]
    return {"case": name, "code": done.returncode, "total_s": round(took_s, 1), "said": said[-6:]}


def main(names: list[str]) -> None:
    """Measure the cases of these names, all without any; "nothing" always comes first."""
    with tempfile.TemporaryDirectory(prefix="ptxdist-hosts-") as name:
        work = Path(name)
        for words in (
            ["phantom", "ph", "--cases", "40", "--positive-share", "0.5"],
            ["preprocess", "--dicom", "ph/dicom-images", "--labels", "ph/train-rle.csv", "--patients",
             "ph/patients.csv", "--out", "cache", "--size", "64", "--size", "96"],
        ):  # fmt: skip
            subprocess.run([*PTXDIST, *words], check=True, cwd=work, capture_output=True)
        rows: list[dict[str, object]] = []
        with cluster_of_hosts(work) as scene:
            for case in dict.fromkeys([UNDISTURBED, *(names or [*CASES, *REFUSED])]):
                try:
                    row = measure(case, scene) if case in CASES else refused(case, scene)
                    if "weights" in row:
                        row["same_bits"] = row["weights"] == rows[0]["weights"] if rows else True
                except Exception as error:
                    row = {"case": case, "failed": str(error)[-3000:]}
                rows.append(row)
                print(json.dumps(row, indent=2), file=sys.stderr, flush=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
        print(json.dumps({"versions": versions, "rows": rows}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
