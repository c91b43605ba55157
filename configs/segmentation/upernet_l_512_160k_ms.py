# upernet_l_512_160k.py, tested at six scales of the resized image, each also mirrored. Training is the same: any
# checkpoint of it can be tested with this file. Expected mIoU on ADE20K val: none published
# (the paper's 53.6 is single scale).
_base_ = "./upernet_l_512_160k.py"
test = {"tta": True}  # test.scales: .5, .75, 1, 1.25, 1.5, 1.75
