"""The paper's ablations as data: what is varied, and what the paper got.

    python ablate.py list

An experiment has variants; a variant's `settings` stand on top of the scale's recipe,
in which an empty set is the baseline; what `halved` names is half as large as there.
`paper` is a mIoU in percent, or one for each number of EM iterations at evaluation;
`paper_note` says what it is of, where not all of them are of the ablations' network
(ResNet-50, trained at stride 16, evaluated at 8, batch 12).
`plot` is what `report` draws: `lines` over the iterations at evaluation, the `matrix`
of figure 4, or `dots`. In a chain each stage has a recipe of its own, and starts from
the weights of the stage before.
"""

# The recipe that each scale stands on.
SCALES = {'paper': 'voc_r50', 'short': 'ablation_short', 'laptop': 'ablation_laptop'}

# Figure 4, mIoU in percent: [trained with T][evaluated with T]. The paper prints no
# more than the upper triangle.
FIGURE_4 = {
    1: {1: 77.34, 2: 77.52, 3: 77.60, 4: 77.59, 5: 77.59, 6: 77.59, 7: 77.59, 8: 77.59},
    2: {2: 77.75, 3: 78.04, 4: 78.15, 5: 78.15, 6: 78.12, 7: 78.12, 8: 78.17},
    3: {3: 78.52, 4: 78.80, 5: 78.86, 6: 78.88, 7: 78.89, 8: 78.88},
    4: {4: 78.14, 5: 78.25, 6: 78.27, 7: 78.28, 8: 78.27},
    5: {5: 77.70, 6: 77.76, 7: 77.82, 8: 77.86},
    6: {6: 77.85, 7: 77.91, 8: 77.92},
    7: {7: 77.11, 8: 77.14},
    8: {8: 77.24}}
TABLE_1 = {'paper_note': 'ResNet-101, stride 8'}
RESNET_50 = {'paper_note': 'ResNet-50'}

EXPERIMENTS = {
    'bases': {
        'about': 'How the initial bases are kept (section 5.2, figure 3 left). '
                 'Back-propagation needs the gradient through all iterations, which '
                 'trains the first convolution too; `gradient` has the moving average '
                 'with that gradient.',
        'paper_says': 'The moving average is best for every number of iterations, by '
                      'at least 0.9; back-propagation is no better than no updating, '
                      'and worse from T = 3 on. The values of the curves are not '
                      'printed; those of the moving average are a row of figure 4.',
        'plot': 'lines',
        'variants': {
            'moving average': {'settings': {}, 'paper': FIGURE_4[3]},
            'back-propagation': {'settings': {'EM_UPDATE': 'back_propagation',
                                              'EM_GRADIENT': 'full'}},
            'no updating': {'settings': {'EM_UPDATE': 'never'}}},
    },
    'normalisation': {
        'about': 'What is done to each basis after an iteration (section 5.3, figure 3 '
                 'right).',
        'paper_says': 'LayerNorm is worse than no normalisation; L2 gains with the '
                      'iterations and is best from T = 3 on; the others hardly depend '
                      'on them. The values of the curves are not printed; those of L2 '
                      'are a row of figure 4.',
        'plot': 'lines',
        'variants': {
            'L2': {'settings': {}, 'paper': FIGURE_4[3]},
            'LayerNorm': {'settings': {'EM_NORM': 'layer_norm'}},
            'none': {'settings': {'EM_NORM': 'none'}}},
    },
    'iterations': {
        'about': 'EM iterations in training and at evaluation (figure 4): one training '
                 'a row, every number at evaluation from its one checkpoint.',
        'paper_says': 'More iterations at evaluation never harm and soon change '
                      'nothing; in training three are best.',
        'plot': 'matrix',
        'variants': {f'T = {t}': {'settings': {'STAGE_NUM': t}, 'paper': row}
                     for t, row in FIGURE_4.items()},
    },
    'n_bases': {
        'about': 'The number of bases, K.',
        'plot': 'dots',
        'variants': {f'K = {k}': {'settings': {'N_BASES': k},
                                  **({'paper': 78.52} if k == 64 else {})}
                     for k in (8, 16, 32, 64, 128, 256)},
    },
    'lambda': {
        'about': 'The sharpness of the responsibilities (eq. 12); towards infinity the '
                 'iteration becomes K-means.',
        'plot': 'dots',
        'variants': {f'lambda = {value:g}': {
            'settings': {'EM_LAMBDA': value},
            **({'paper': 78.52} if value == 1 else {})}
            for value in (0.5, 1.0, 2.0, 4.0)},
    },
    'kernel': {
        'about': 'What measures how near a pixel is to a basis (eq. 11). The paper '
                 'says that the differences are trivial.',
        'plot': 'dots',
        'variants': {
            'exponential of the dot product': {'settings': {}, 'paper': 78.52},
            'dot product': {'settings': {'EM_KERNEL': 'dot'}},
            'Euclidean (RBF)': {'settings': {'EM_KERNEL': 'euclidean'}}},
    },
    'gradient': {
        'about': 'How far the gradient goes through the iterations. The paper does not '
                 'say; the released code stops it. Where it comes through, the first '
                 'convolution is trained, unless it is fixed.',
        'plot': 'dots',
        'variants': {
            'none': {'settings': {}, 'paper': 78.52},
            'last iteration': {'settings': {'EM_GRADIENT': 'last'}},
            'full': {'settings': {'EM_GRADIENT': 'full'}},
            'full, first convolution fixed': {'settings': {'EM_GRADIENT': 'full',
                                                           'EM_CONV1': 'fixed'}}},
    },
    'conv1': {
        'about': "The unit's first convolution: random and fixed as in the released "
                 'code, left out, or trained, which takes a gradient through the '
                 'iterations.',
        'plot': 'dots',
        'variants': {
            'random, fixed': {'settings': {}, 'paper': 78.52},
            'absent': {'settings': {'EM_CONV1': 'absent'}},
            'trained (gradient full)': {'settings': {'EM_GRADIENT': 'full'}},
            'absent (gradient full)': {'settings': {'EM_GRADIENT': 'full',
                                                    'EM_CONV1': 'absent'}}},
    },
    'loss': {
        'about': 'What the loss is divided by; not in the paper.',
        'plot': 'dots',
        'variants': {
            'all pixels of the crops': {'settings': {}, 'paper': 78.52},
            'valid pixels': {'settings': {'LOSS_NORM': 'valid'}}},
    },
    'bias_rate': {
        'about': 'The learning rate of the biases; not in the paper.',
        'plot': 'dots',
        'variants': {
            'twice': {'settings': {'BIAS_LR': 2.0}, 'paper': 78.52},
            'like the rest': {'settings': {'BIAS_LR': 1.0}}},
    },
    'multi_grid': {
        'about': 'The dilations of the blocks of layer4.',
        'plot': 'dots',
        'variants': {
            '1, 2, 4': {'settings': {'MULTI_GRID': (1, 2, 4)}, 'paper': 78.52},
            '1, 1, 1': {'settings': {'MULTI_GRID': (1, 1, 1)}}},
    },
    'bn_momentum': {
        'about': 'The share of a new batch in the running statistics of the batch '
                 'norms.',
        'plot': 'dots',
        'variants': {
            '0.0003': {'settings': {'BN_MOM': 0.0003}, 'paper': 78.52},
            '0.003': {'settings': {'BN_MOM': 0.003}},
            '0.1': {'settings': {'BN_MOM': 0.1}}},
    },
    'heads': {
        'about': "Table 1's heads, and the A2 and Non-local blocks of section 6.2.2, "
                 'all under one recipe. For Table 1 itself make them with '
                 '`N_LAYERS=101 STRIDE=8 BATCH_SIZE=16`.',
        'plot': 'dots',
        'variants': {
            'EMANet': {'settings': {}, 'paper': 78.52, **RESNET_50},
            'EMANet, no fc1': {'settings': {'FC1_CHANNELS': 0}, 'paper': 80.05,
                               **TABLE_1},
            'EMANet, no fc1, half the channels': {
                'settings': {'FC1_CHANNELS': 0}, 'halved': 'HEAD_CHANNELS',
                'paper': 79.73, 'paper_note': 'EMANet(256), ResNet-101, stride 8'},
            'EMANet, T = 1': {'settings': {'STAGE_NUM': 1}, 'paper': 77.34,
                              **RESNET_50},
            'EMANet of mmsegmentation': {'settings': {'HEAD': 'ema_mmseg'}},
            'FCN': {'settings': {'HEAD': 'fcn'}},
            'DeepLabV3': {'settings': {'HEAD': 'deeplabv3'}, 'paper': 78.51, **TABLE_1},
            'DeepLabV3+': {'settings': {'HEAD': 'deeplabv3plus'}, 'paper': 79.35,
                           **TABLE_1},
            'PSANet': {'settings': {'HEAD': 'psanet'}, 'paper': 78.51, **TABLE_1},
            'Non-local': {'settings': {'HEAD': 'nonlocal'}, 'paper': 77.78,
                          **RESNET_50},
            'A2': {'settings': {'HEAD': 'a2'}, 'paper': 77.41, **RESNET_50}},
    },
    **{f'voc_test_r{n}': {
        'about': "The VOC test server's three stages. The last one learns from val, so "
                 'its score there is no result; in its folder `python eval.py '
                 'VAL_SPLIT=test EVAL_MODE=multi EVAL_FLIP=true --submit` packs what '
                 f'the server scores (the paper: {test}).',
        'plot': 'dots',
        'chain': True,
        'variants': {
            'COCO': {'recipe': f'voc_test_r{n}_coco'},
            'trainaug': {'recipe': f'voc_test_r{n}_trainaug'},
            'trainval': {'recipe': f'voc_test_r{n}'}},
    } for n, test in ((101, 87.7), (152, 88.2))},
}
