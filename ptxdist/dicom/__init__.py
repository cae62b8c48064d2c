"""One DICOM or PNG file to one radiograph."""
