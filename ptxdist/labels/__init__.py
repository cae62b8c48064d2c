"""Reading masks from label tables and folders of mask images."""
