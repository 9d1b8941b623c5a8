"""What training costs: FLOPs by a stated convention, seconds by phase, joules by counter."""
