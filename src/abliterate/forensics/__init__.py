"""The algebra of an edit read backwards: was a checkpoint edited, how, and how is it undone?

reading     the writers of a checkpoint as matrices, streamed
spectra     the small end of W Wᵀ
verdict     evidence → calibrated probability
lone        a checkpoint by itself
difference  a checkpoint beside the one it was made from
wording     an inspection in sentences
"""
