"""What there is to train on and how: the data sets, and named sets of settings.

    python train.py RECIPE=voc_r50                  # then: python eval.py

Data only. A recipe stands on top of settings.py; words after it on the command line
win. Its scores are what it should reach: `mIoU` with single-scale inference, `mIoU_ms`
with several scales and flips.
"""


# -- data sets -------------------------------------------------------------------------

def voc_palette(n: int = 256) -> list[int]:
    """Return the palette of the VOC masks: n colours of 3 bytes, flat.

    The bits of an index are dealt out in turn to red, green and blue, from the highest
    bit of each colour down.
    """
    palette = []
    for index in range(n):
        rgb = [0, 0, 0]
        for bit in range(8):
            rgb[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        palette += rgb
    return palette


def fill_palette(*colours: tuple[int, int, int]) -> list[int]:
    """Return a flat palette of 256 colours: the given ones, black, and grey for 255."""
    flat = [value for colour in colours for value in colour]
    return flat + [0] * (765 - len(flat)) + [128] * 3


def names(text: str) -> tuple[str, ...]:
    """Return the names that stand in a text, with commas between."""
    return tuple(' '.join(text.split()).split(', '))


VOC = names("""
    background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow,
    diningtable, dog, horse, motorbike, person, pottedplant, sheep, sofa, train,
    tvmonitor""")
CONTEXT = VOC + names("""
    bag, bed, bench, book, building, cabinet, ceiling, clothes, computer, cup, door,
    fence, floor, flower, food, grass, ground, keyboard, light, mountain, mouse,
    curtain, platform, sign, plate, road, rock, shelves, sidewalk, sky, snow,
    bedcloth, track, tree, truck, wall, water, window, wood""")
COCO_STUFF = names("""
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic
    light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse,
    sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
    suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball
    glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
    knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
    pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
    laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush,
    banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard,
    carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard,
    curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
    floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit,
    furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat,
    metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow,
    plant-other, plastic, platform, playingfield, railing, railroad, river, road,
    rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow,
    solid-other, stairs, stone, straw, structural-other, table, tent, textile-other,
    towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel,
    wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
    window-other, wood""")
CITYSCAPES = names("""
    road, sidewalk, building, wall, fence, pole, traffic light, traffic sign,
    vegetation, terrain, sky, person, rider, car, truck, bus, train, motorcycle,
    bicycle""")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32,
                  33)  # the label id of each class; the test server wants these

# Facts of each data set. `images` and `masks` are where the files of an entry {} of a
# list lie below `root`, the default folder; of several kinds of masks the first that is
# there is taken. `map` says what values of a mask mean (255: ignored), the others are
# classes. `train` and `val` are the default lists, `counts` the official lengths.
# `server` is the kind of archive that its test server wants, and the name in it of the
# result of {}, the last part of an entry; it wants the values of `map` back.
LAYOUT = {'images': 'JPEGImages/{}.jpg', 'masks': ('SegmentationClass/{}.png',),
          'palette': voc_palette(), 'map': {}, 'train': 'train', 'val': 'val',
          'counts': {}, 'server': ('', '')}
DATASETS = {
    'voc': {
        **LAYOUT, 'classes': VOC, 'root': 'data/VOCdevkit/VOC2012',
        'masks': ('SegmentationClassAug/{}.png', 'SegmentationClass/{}.png'),
        'train': 'trainaug',
        'counts': {'train': 1464, 'val': 1449, 'trainval': 2913, 'trainaug': 10582,
                   'test': 1456},
        'server': ('tar', 'results/VOC2012/Segmentation/comp6_test_cls/{}.png'),
        'get': 'run `python prepare.py voc --download`, or give it the archives that '
               'you have',
    },
    'context': {
        **LAYOUT, 'classes': CONTEXT, 'root': 'data/context',
        'counts': {'train': 4998, 'val': 5105},
        'get': 'run `python prepare.py context --help`',
    },
    'context59': {  # the same files; background is ignored
        **LAYOUT, 'classes': CONTEXT[1:], 'root': 'data/context',
        'palette': voc_palette()[3:180] + fill_palette()[177:],
        'map': {0: 255, **{i: i - 1 for i in range(1, 60)}},
        'counts': {'train': 4998, 'val': 5105},
        'get': 'run `python prepare.py context --help`',
    },
    'cocostuff10k': {
        **LAYOUT, 'classes': COCO_STUFF, 'root': 'data/cocostuff10k', 'val': 'test',
        'counts': {'train': 9000, 'test': 1000},
        'get': 'run `python prepare.py cocostuff10k --help`',
    },
    'cocostuff164k': {
        **LAYOUT, 'classes': COCO_STUFF, 'root': 'data/cocostuff164k',
        'counts': {'train': 118287, 'val': 5000},
        'get': 'run `python prepare.py cocostuff164k --help`',
    },
    'cityscapes': {
        **LAYOUT, 'classes': CITYSCAPES, 'root': 'data/cityscapes',
        'images': 'leftImg8bit/{}_leftImg8bit.png',
        'masks': ('gtFine/{}_gtFine_labelIds.png',),
        'map': {**dict.fromkeys(range(34), 255),
                **{value: i for i, value in enumerate(CITYSCAPES_IDS)}},
        'palette': fill_palette(
            (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156),
            (190, 153, 153), (153, 153, 153), (250, 170, 30), (220, 220, 0),
            (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
            (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230),
            (119, 11, 32)),
        'counts': {'train': 2975, 'val': 500, 'test': 1525},
        'server': ('zip', '{}_predicted.png'),
        'get': 'run `python prepare.py cityscapes --help`',
    },
    'coco_voc': {
        **LAYOUT, 'classes': VOC, 'root': 'data/coco_voc',
        'get': 'run `python prepare.py coco_voc --help`',
    },
    'folder': {  # what prepare.py writes into dataset.json stands on top of this
        **LAYOUT, 'classes': (), 'root': 'data/folder',
        'get': 'run `python prepare.py folder --help`',
    },
    'shapes': {
        **LAYOUT, 'root': 'data/shapes',
        'classes': names('background, balloon, house, mushroom, parasol, pumpkin, '
                         'star, tree, duck, goose'),
        'palette': fill_palette(
            (0, 0, 0), (230, 60, 50), (160, 110, 70), (190, 70, 200), (60, 150, 230),
            (250, 140, 20), (250, 220, 60), (40, 150, 70), (90, 230, 230),
            (240, 240, 240)),
        'get': 'run `python prepare.py shapes`',
    },
}

# -- recipes ---------------------------------------------------------------------------

# mmsegmentation's schedule and head for Cityscapes. It aligns the corners for crops of
# a multiple of 8 plus 1 pixels, and not for those of a multiple.
MMSEG = {
    'DATASET': 'cityscapes', 'BATCH_SIZE': 8, 'ITER_MAX': 80000, 'LR': 0.01,
    'LR_END': 1e-4, 'LR_EVERY': 1, 'BIAS_LR': 1.0, 'WEIGHT_DECAY': 5e-4,
    'DECAY_ALL': True, 'BN_MOM': 0.1, 'MULTI_GRID': (1, 1, 1), 'EM_RENORM': True,
    'AUX_WEIGHT': 0.4, 'HEAD': 'ema_mmseg'}
RECIPES = {
    'demo': {
        'about': 'shapes, a small network from scratch, minutes on two CPU cores',
        'mIoU': 0.80,
        'settings': {
            'DATASET': 'shapes', 'CROP_SIZE': 129, 'SCALES': (0.75, 1.0, 1.25),
            'N_LAYERS': 18, 'STEM': 'plain', 'PRETRAINED': 'none', 'BN_MOM': 0.1,
            'HEAD_CHANNELS': 128, 'FC1_CHANNELS': 64, 'N_BASES': 16,
            'BATCH_SIZE': 4, 'ITER_MAX': 1400, 'LR': 0.05, 'WEIGHT_DECAY': 5e-4,
            'N_WORKERS': 1, 'IMAGE_EVERY': 200},
    },
    'voc_r101': {
        'about': 'VOC val, the released recipe: settings.py as it is',
        'mIoU': 0.8005, 'mIoU_ms': 0.8132,
        'settings': {'DATASET': 'voc'},
    },
    'voc_r101_emanet256': {
        'about': "VOC val, EMANet(256) of the paper's Table 1",
        'mIoU': 0.7973, 'mIoU_ms': 0.8094,
        'settings': {'DATASET': 'voc', 'HEAD_CHANNELS': 256, 'FC1_CHANNELS': 0},
    },
    'voc_r50': {
        'about': "VOC val, the paper's ablations: train at stride 16, evaluate at 8",
        'mIoU': 0.7852,
        'settings': {'DATASET': 'voc', 'N_LAYERS': 50, 'BATCH_SIZE': 12, 'STRIDE': 16,
                     'EVAL_STRIDE': 8},
    },
    'voc_r50_t1': {
        'about': 'the same with one EM iteration, in training and evaluation',
        'mIoU': 0.7734,
        'settings': {'DATASET': 'voc', 'N_LAYERS': 50, 'BATCH_SIZE': 12, 'STRIDE': 16,
                     'EVAL_STRIDE': 8, 'STAGE_NUM': 1},
    },
    'voc_r101_deeplabv3': {
        'about': "DeepLabV3, the rival of the paper's Table 1, by the same recipe",
        'mIoU': 0.7851, 'mIoU_ms': 0.7977,
        'settings': {'DATASET': 'voc', 'HEAD': 'deeplabv3'},
    },
    'voc_r101_deeplabv3plus': {
        'about': "DeepLabV3+, the rival of the paper's Table 1, by the same recipe",
        'mIoU': 0.7935, 'mIoU_ms': 0.8057,
        'settings': {'DATASET': 'voc', 'HEAD': 'deeplabv3plus'},
    },
    'voc_r101_psanet': {
        'about': "PSANet, the rival of the paper's Table 1, by the same recipe",
        'mIoU': 0.7851, 'mIoU_ms': 0.7977,
        'settings': {'DATASET': 'voc', 'HEAD': 'psanet'},
    },
    'voc_r50_nonlocal': {
        'about': 'the Non-local block in the place of the unit, as in voc_r50',
        'mIoU': 0.7778,
        'settings': {'DATASET': 'voc', 'N_LAYERS': 50, 'BATCH_SIZE': 12, 'STRIDE': 16,
                     'EVAL_STRIDE': 8, 'HEAD': 'nonlocal'},
    },
    'voc_r50_a2': {
        'about': 'the A2 block in the place of the unit, as in voc_r50',
        'mIoU': 0.7741,
        'settings': {'DATASET': 'voc', 'N_LAYERS': 50, 'BATCH_SIZE': 12, 'STRIDE': 16,
                     'EVAL_STRIDE': 8, 'HEAD': 'a2'},
    },
    # The smaller scales of ablate.py: one for an hour on a GPU, and one for two CPU
    # cores, which takes the words DATASET and DATA_ROOT besides.
    'ablation_short': {
        'about': 'voc_r50, a fifth as long and with smaller crops, for one GPU',
        'settings': {'DATASET': 'voc', 'N_LAYERS': 50, 'BATCH_SIZE': 12, 'STRIDE': 16,
                     'EVAL_STRIDE': 8, 'CROP_SIZE': 321, 'PSA_GRID': (21, 21),
                     'ITER_MAX': 6000, 'BN_MOM': 0.003},
    },
    'ablation_laptop': {
        'about': 'a small network from scratch, a minute or two a run on one CPU core',
        'settings': {
            'DATASET': 'shapes', 'CROP_SIZE': 129, 'SCALES': (0.8, 1.0, 1.25),
            'N_LAYERS': 18, 'STEM': 'plain', 'PRETRAINED': 'none', 'BN_MOM': 0.1,
            'HEAD_CHANNELS': 128, 'FC1_CHANNELS': 64, 'N_BASES': 16,
            'PSA_GRID': (9, 9), 'STRIDE': 16, 'EVAL_STRIDE': 8, 'BATCH_SIZE': 4,
            'ITER_MAX': 300, 'LR': 0.05, 'WEIGHT_DECAY': 5e-4, 'N_WORKERS': 0,
            'IMAGE_EVERY': 0, 'EVAL_EVERY': 100, 'EVAL_IMAGES': 40},
    },
    'voc_test_r101_coco': {
        'about': 'VOC test server, the first of three stages: COCO',
        'settings': {'DATASET': 'coco_voc', 'N_LAYERS': 101, 'ITER_MAX': 150000,
                     'LOG_DIR': 'logdir/voc_test_r101_coco'},
    },
    'voc_test_r101_trainaug': {
        'about': 'the second, from the weights of the first: trainaug',
        'settings': {'DATASET': 'voc', 'N_LAYERS': 101, 'LR': 0.001,
                     'INIT_FROM': 'logdir/voc_test_r101_coco/final.pth',
                     'LOG_DIR': 'logdir/voc_test_r101_trainaug'},
    },
    'voc_test_r101': {
        'about': 'the third, from the weights of the second: trainval',
        'mIoU_ms': 0.877,  # of the server's test list
        'settings': {'DATASET': 'voc', 'N_LAYERS': 101, 'LR': 0.0001,
                     'TRAIN_SPLIT': 'trainval',
                     'INIT_FROM': 'logdir/voc_test_r101_trainaug/final.pth',
                     'LOG_DIR': 'logdir/voc_test_r101'},
    },
    'voc_test_r152_coco': {
        'about': 'VOC test server, the first of three stages: COCO',
        'settings': {'DATASET': 'coco_voc', 'N_LAYERS': 152, 'ITER_MAX': 150000,
                     'LOG_DIR': 'logdir/voc_test_r152_coco'},
    },
    'voc_test_r152_trainaug': {
        'about': 'the second, from the weights of the first: trainaug',
        'settings': {'DATASET': 'voc', 'N_LAYERS': 152, 'LR': 0.001,
                     'INIT_FROM': 'logdir/voc_test_r152_coco/final.pth',
                     'LOG_DIR': 'logdir/voc_test_r152_trainaug'},
    },
    'voc_test_r152': {
        'about': 'the third, from the weights of the second: trainval',
        'mIoU_ms': 0.882,  # of the server's test list
        'settings': {'DATASET': 'voc', 'N_LAYERS': 152, 'LR': 0.0001,
                     'TRAIN_SPLIT': 'trainval',
                     'INIT_FROM': 'logdir/voc_test_r152_trainaug/final.pth',
                     'LOG_DIR': 'logdir/voc_test_r152'},
    },
    'context_r50': {
        'about': 'PASCAL Context, 60 classes with background',
        'mIoU_ms': 0.505,
        'settings': {'DATASET': 'context', 'N_LAYERS': 50, 'ITER_MAX': 15000,
                     'STRIDE': 16, 'EVAL_STRIDE': 8},
    },
    'context_r101': {
        'about': 'PASCAL Context, 60 classes with background',
        'mIoU_ms': 0.531,
        'settings': {'DATASET': 'context', 'N_LAYERS': 101, 'ITER_MAX': 15000,
                     'STRIDE': 16, 'EVAL_STRIDE': 8},
    },
    'cocostuff_r50': {
        'about': 'COCO-Stuff 10K, 171 classes',
        'mIoU_ms': 0.376,
        'settings': {'DATASET': 'cocostuff10k', 'N_LAYERS': 50},
    },
    'cocostuff_r101': {
        'about': 'COCO-Stuff 10K, 171 classes',
        'mIoU_ms': 0.399,
        'settings': {'DATASET': 'cocostuff10k', 'N_LAYERS': 101},
    },
    'cityscapes_r50_512x1024': {
        'about': "Cityscapes, mmsegmentation's schedule and head",
        'mIoU': 0.7759, 'mIoU_ms': 0.7944,
        'settings': {**MMSEG, 'N_LAYERS': 50, 'CROP_SIZE': 512, 'CROP_WIDTH': 1024,
                     'ALIGN_CORNERS': False},
    },
    'cityscapes_r101_512x1024': {
        'about': "Cityscapes, mmsegmentation's schedule and head",
        'mIoU': 0.7910, 'mIoU_ms': 0.8121,
        'settings': {**MMSEG, 'N_LAYERS': 101, 'CROP_SIZE': 512, 'CROP_WIDTH': 1024,
                     'ALIGN_CORNERS': False},
    },
    'cityscapes_r50_769x769': {
        'about': "Cityscapes, mmsegmentation's schedule and head",
        'mIoU': 0.7933, 'mIoU_ms': 0.8049,
        'settings': {**MMSEG, 'N_LAYERS': 50, 'CROP_SIZE': 769, 'CROP_WIDTH': 769},
    },
    'cityscapes_r101_769x769': {
        'about': "Cityscapes, mmsegmentation's schedule and head",
        'mIoU': 0.7962, 'mIoU_ms': 0.8100,
        'settings': {**MMSEG, 'N_LAYERS': 101, 'CROP_SIZE': 769, 'CROP_WIDTH': 769},
    },
    'cityscapes_r101_ohem': {
        'about': 'Cityscapes with OHEM; its author published no recipe, this is ours',
        'mIoU': 0.8114,
        'settings': {**MMSEG, 'HEAD': 'ema', 'N_LAYERS': 101, 'CROP_SIZE': 769,
                     'OHEM_BELOW': 0.7},
    },
}
