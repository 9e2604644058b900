"""T1's SFT data: chains of thought that try, notice, correct and verify, made of attempts and critiques.

Read `chain.py` first: one question's way through the stages.
"""
