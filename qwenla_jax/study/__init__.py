"""The paper in miniature: arms, measures, claims, figures, the report."""
