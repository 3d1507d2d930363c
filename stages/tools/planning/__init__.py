"""params.yaml and this machine -> what the stages would compute, refuse and cost, before any of them runs."""
