"""Are two answers the same?"""
