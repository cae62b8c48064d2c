"""ptxdist: DICOM chest X-rays with masks → verified cache → distributed two-stage U-Net → numbers one can trust."""

__version__ = "0.1.0"
