"""replace_softmax in models of other libraries: what is replaced, refused, and how exact it is."""
