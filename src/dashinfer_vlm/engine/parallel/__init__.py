"""One model over several devices: a process for each rank, of which the first is the engine and tells the others."""
