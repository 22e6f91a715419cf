"""Which neurons of a feed-forward layer a token needs: what serving reads of a calibration."""
