"""A trained model as files that others run, preprocessing and calibration inside."""
