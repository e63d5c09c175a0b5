"""From files to arrays: which image goes with which label, decoding, ids."""
