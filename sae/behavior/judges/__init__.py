"""Judges of behaviour in natural text, and which one is used.

`substring.py`: by listed phrases, ours and refusal_direction's. `classifier.py`: a small linear model, which
`fitting.py` fits on your labelled completions. `endpoint.py`: a language model behind an OpenAI-compatible address.
`log_odds.py` needs no completion: it reads the first token's distribution. `registry.py` picks the judge of a
behaviour, `identity.py` says which one it was. `sae.behavior.judge` says what a judge is.
"""
