"""The recurrent part of LSTM, GRU and RNN, over all steps of a sequence."""
