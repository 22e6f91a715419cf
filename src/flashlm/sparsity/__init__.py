"""Which neurons of a feed-forward layer a token needs: profiles, predictors, thresholds, neuron order."""
