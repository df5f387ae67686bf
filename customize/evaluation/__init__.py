"""How well a concept was learned: subject fidelity, prompt fidelity, prior preservation, diversity."""
