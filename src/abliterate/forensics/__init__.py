"""The algebra of an edit read backwards: was a checkpoint edited, how, and how is it undone?

reading     the writers of a checkpoint as matrices, streamed
spectra     the small end of W Wᵀ
verdict     evidence → calibrated probability
single      a checkpoint by itself
power       which edits would have been seen in it
notches     writers that write too little along the model's own direction
difference  a checkpoint beside the one it was made from
inspect     tensors, activations and behaviour in one inspection
repair      an edit taken back, exactly or approximately
audit       how brittle refusal is: plans of a fixed protocol
harden      refusal spread over several directions, and what that is worth
"""
