# after block 2
assert again.keys() == atlas.keys()
assert composition.question == "composition"
assert len(atlas.keys()) == len(again.keys())
