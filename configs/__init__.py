"""Configuration files; hydra finds them as pkg://polydiff.configs."""
