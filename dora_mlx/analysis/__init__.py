"""What a training did to the weights: the measures, the analysis of a run, its pictures."""
