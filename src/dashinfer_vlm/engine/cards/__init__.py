"""Steps on a card: started one ahead, from buffers that never move, so that their model calls replay as graphs."""
