"""Named sets of settings, each with the score it should reach: data only.

    python train.py RECIPE=voc_r50                  # then: python eval.py

A recipe stands on top of settings.py; words after it on the command line win.
"""
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
        'mIoU': 0.8005,
        'settings': {'DATASET': 'voc'},
    },
    'voc_r101_emanet256': {
        'about': "VOC val, EMANet(256) of the paper's Table 1",
        'mIoU': 0.7973,
        'settings': {'DATASET': 'voc', 'HEAD_CHANNELS': 256, 'FC1_CHANNELS': 0},
    },
    'voc_r50': {
        'about': "VOC val, the paper's ablations: train at stride 16, evaluate at 8",
        'mIoU': 0.7852,
        'settings': {'DATASET': 'voc', 'N_LAYERS': 50, 'BATCH_SIZE': 12, 'STRIDE': 16,
                     'EVAL_STRIDE': 8},
    },
}
