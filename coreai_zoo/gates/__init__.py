"""Gates: does a bundle compute what its checkpoint computes?"""
