/* mLSTM: to come. */
