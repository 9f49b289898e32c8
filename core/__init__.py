"""The shared core: schedules, processes, denoisers, solvers, training, evaluation. It knows no modality."""
