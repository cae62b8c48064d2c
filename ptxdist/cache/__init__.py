"""From files and tables to verified stores: one catalog, one zarr store a size."""
