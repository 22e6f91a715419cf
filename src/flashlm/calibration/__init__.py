"""What a text tells of a model: predictors, neuron order, routing, and what an approximation costs."""
