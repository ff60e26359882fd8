"""The mathematics: pure functions of arrays and seeds, NumPy only, the same bits wherever they run."""
