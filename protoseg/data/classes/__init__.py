"""Class lists and colours that others have published, and colours for lists without."""
