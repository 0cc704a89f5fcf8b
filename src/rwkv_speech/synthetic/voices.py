"""Speakers of the tiny default: variants of eSpeak NG's voices."""

# Variants that pretraining, training and test may use; an unseen speaker is in the test set alone.
TRAIN_VARIANTS = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike "
    "Nguyen Reed RicishayMax RicishayMax2 Storm adam anika announcer antonio aunty belinda benjamin boris caleb croak "
    "david ed edward edward2 f1 f2 f4 f5 grandma grandpa gustave iven iven2 iven3 kaukovalta klatt klatt2 klatt3 "
    "klatt4 klatt6 m1 m2 m4 m5 m6 m8 marcelo max michel miguel mike2 paul pedro quincy rob robosoft robosoft3 "
    "robosoft4 robosoft6 robosoft8 sandro shelby steph steph2 travis victor zac"
).split()
TEST_VARIANTS = "f3 m3 m7 linda robert klatt5 steph3 iven4".split()
