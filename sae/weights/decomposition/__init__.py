"""Parameter decomposition: a small model's matrices as sums of rank-one components, few of which matter at a token.

Every matrix W [d_out d_in] becomes sum_c outer(U_c, V_c) + rest, exactly; a learned function of the inner activations
V_c . x says how much each component matters at a token. Stochastic parameter decomposition (Bushnaq et al. 2025,
2506.20790), after attribution-based parameter decomposition (Braun et al. 2025, 2501.14926).

    target = LanguageTarget(lm, block_matrices(lm), batch)      # what is decomposed, and on which text
    decomposition = decompose(target, DecompositionSettings(steps=2000), folder)
    evaluate(target, decomposition)                             # KL under masks, adversarial ones included; L0
    find_carriers(lm, decomposition, objective, shown, other)   # which components carry a behaviour

`target.py` is what is decomposed, `components.py` the components and `gates.py` their importance, `masks.py` and
`forward.py` the model under masks, `train.py` the loop, `saved.py` the folder on disk, `evaluate.py` and `known.py` how
good it is, `carriers.py` which components carry a behaviour and what that says of single weights.
"""
