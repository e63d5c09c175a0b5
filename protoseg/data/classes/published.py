"""Names and colours of the published class lists, in class-id order, and where each list comes from."""

from protoseg.data.classes.palette import hex_colours


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.replace("\n", " ").split(";"))


def _ids(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


# CamVid, the 11 classes of Badrinarayanan et al., "SegNet", TPAMI 2017; colours of that tutorial.
CAMVID_CLASSES = _names("""
sky; building; pole; road; pavement; tree; sign; fence; car; pedestrian; bicyclist
""")
CAMVID_PALETTE = hex_colours("808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0")
# ADE20K SceneParsing, objectInfo150.txt (first synonym) and color150.mat of
# github.com/CSAILVision/sceneparsing.
ADE20K_CLASSES = _names("""
wall; building; sky; floor; tree; ceiling; road; bed; windowpane; grass; cabinet; sidewalk; person; earth;
door; table; mountain; plant; curtain; chair; car; water; painting; sofa; shelf; house; sea; mirror; rug;
field; armchair; seat; fence; desk; rock; wardrobe; lamp; bathtub; railing; cushion; base; box; column;
signboard; chest of drawers; counter; sand; sink; skyscraper; fireplace; refrigerator; grandstand; path;
stairs; runway; case; pool table; pillow; screen door; stairway; river; bridge; bookcase; blind; coffee
table; toilet; flower; book; hill; bench; countertop; stove; palm; kitchen island; computer; swivel chair;
boat; bar; arcade machine; hovel; bus; towel; light; truck; tower; chandelier; awning; streetlight; booth;
television receiver; airplane; dirt track; apparel; pole; land; bannister; escalator; ottoman; bottle;
buffet; poster; stage; van; ship; fountain; conveyer belt; canopy; washer; plaything; swimming pool;
stool; barrel; basket; waterfall; tent; bag; minibike; cradle; oven; ball; food; step; tank; trade name;
microwave; pot; animal; bicycle; lake; dishwasher; screen; blanket; sculpture; hood; sconce; vase; traffic
light; tray; ashcan; fan; pier; crt screen; plate; monitor; bulletin board; shower; radiator; glass;
clock; flag
""")
ADE20K_PALETTE = hex_colours("""
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33
ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff
08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff
eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff
0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad
0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2
00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa
8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3
ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff
00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
""")
# Cityscapes, helpers/labels.py of github.com/mcordts/cityscapesScripts: name, id in labelIds files,
# colour of the 19 classes that are evaluated. The other ids from 0 to 33 are void.
CITYSCAPES_CLASSES = _names("""
road; sidewalk; building; wall; fence; pole; traffic light; traffic sign; vegetation; terrain; sky;
person; rider; car; truck; bus; train; motorcycle; bicycle
""")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_PALETTE = hex_colours("""
804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046
003c64 005064 0000e6 770b20
""")
# COCO-Stuff, labels.txt of github.com/nightrome/cocostuff: ids 1-182, of which these 11 thing classes are
# never annotated (its README, "Label Names & Indices"); the other 171 are the classes, in the order of
# their ids.
_COCOSTUFF_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
COCOSTUFF_IDS = tuple(i for i in range(1, 183) if i not in _COCOSTUFF_UNUSED)
COCOSTUFF_CLASSES = _names("""
person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light; fire hydrant; stop
sign; parking meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra; giraffe; backpack;
umbrella; handbag; tie; suitcase; frisbee; skis; snowboard; sports ball; kite; baseball bat; baseball
glove; skateboard; surfboard; tennis racket; bottle; wine glass; cup; fork; knife; spoon; bowl; banana;
apple; sandwich; orange; broccoli; carrot; hot dog; pizza; donut; cake; chair; couch; potted plant; bed;
dining table; toilet; tv; laptop; mouse; remote; keyboard; cell phone; microwave; oven; toaster; sink;
refrigerator; book; clock; vase; scissors; teddy bear; hair drier; toothbrush; banner; blanket; branch;
bridge; building-other; bush; cabinet; cage; cardboard; carpet; ceiling-other; ceiling-tile; cloth;
clothes; clouds; counter; cupboard; curtain; desk-stuff; dirt; door-stuff; fence; floor-marble;
floor-other; floor-stone; floor-tile; floor-wood; flower; fog; food-other; fruit; furniture-other; grass;
gravel; ground-other; hill; house; leaves; light; mat; metal; mirror-stuff; moss; mountain; mud; napkin;
net; paper; pavement; pillow; plant-other; plastic; platform; playingfield; railing; railroad; river;
road; rock; roof; rug; salad; sand; sea; shelf; sky-other; skyscraper; snow; solid-other; stairs; stone;
straw; structural-other; table; tent; textile-other; towel; tree; vegetable; wall-brick; wall-concrete;
wall-other; wall-panel; wall-stone; wall-tile; wall-wood; water-other; waterdrops; window-blind;
window-other; wood
""")
# PASCAL-Context, the 59 most frequent classes (Mottaghi et al., CVPR 2014) and their ids in the 459-class
# .mat files. Order: by those ids, which is alphabetical; the common PNG conversion (Detail API, as used
# by PyTorch-Encoding and mmsegmentation) writes 1-59 in this order and 0 for everything else.
PCONTEXT_CLASSES = _names("""
aeroplane; bag; bed; bedclothes; bench; bicycle; bird; boat; book; bottle; building; bus; cabinet; car;
cat; ceiling; chair; cloth; computer; cow; cup; curtain; dog; door; fence; floor; flower; food; grass;
ground; horse; keyboard; light; motorbike; mountain; mouse; person; plate; platform; pottedplant; road;
rock; sheep; shelves; sidewalk; sign; sky; snow; sofa; table; track; train; tree; truck; tvmonitor; wall;
water; window; wood
""")
PCONTEXT_IDS = _ids("""
2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162 187 189 207 220
232 258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416 420 424 427 440 445 454
458
""")
# Pascal VOC 2012, VOClabelcolormap and classes of the development kit.
VOC_CLASSES = _names("""
background; aeroplane; bicycle; bird; boat; bottle; bus; car; cat; chair; cow; diningtable; dog; horse;
motorbike; person; pottedplant; sheep; sofa; train; tvmonitor
""")
VOC_PALETTE = hex_colours("""
000000 800000 008000 808000 000080 800080 008080 808080 400000 c00000 408000 c08000 400080 c00080 408080
c08080 004000 804000 00c000 80c000 004080
""")
