"""Lab: synthetic images, pretraining of mini, the demo and the benches."""
