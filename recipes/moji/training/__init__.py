"""What the recipes' trainings share: the run, its log, Muon, how weights begin."""
