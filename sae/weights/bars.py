"""What a clean removal stays below, in rates and in nats a token."""

GONE = 0.05  # the behaviour's rate with it cut; before, it is at least 1 - GONE, as it is with a random set cut
MOVED = 0.01  # the change of any other behaviour's rate, or of the facts
KL_BAR = 0.01  # KL along the model's own harmless replies
