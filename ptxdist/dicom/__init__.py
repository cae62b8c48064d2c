"""Reading one DICOM or PNG file as one radiograph."""
