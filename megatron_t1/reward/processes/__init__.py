"""Killable processes behind futures: their owner (`pool`), what it knows of each (`grader`), the inside (`worker`)."""
