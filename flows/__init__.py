"""When and in which order things run: Prefect flows over the stages of dvc.yaml."""
