"""The paper's statements on exact tabular policies: closed forms beside plain enumeration.

`worlds` builds the distributions; `distillation` holds Theorem 1, Proposition 1 and the two phases;
`bandwidth` Appendix A.3; `shared` Theorems 2 and 3; `evidence` Theorem 4; `direction` Theorem 5
and the self-distillation term inside RLSD; `hindsight` the policy gradient as distillation.
Everything is float64 and imports torch alone.
"""
