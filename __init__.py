"""Foundation models for DNA, proteins, small molecules and single cells.

>>> import processive as pv
>>> model = pv.load("runs/chem")
>>> model.generate(100, temperature=0.9)
"""
