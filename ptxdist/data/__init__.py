"""Files in, stores out: numpy, pydicom, zarr, cv2; never torch."""
