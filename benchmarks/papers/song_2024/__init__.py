"""Song, Ahn & Yun 2024, reproduced."""
