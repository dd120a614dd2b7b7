"""Figures of papers, measured again; each module runs one study and is shown by the notebook of its number."""
