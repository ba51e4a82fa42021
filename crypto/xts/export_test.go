package xts

// Accelerated tells whether New uses the kernels.
func Accelerated() bool { return accelerated }

// NewGeneric is New without them.
func NewGeneric(key []byte) (*Cipher, error) {
	g, err := newGeneric(key)
	if err != nil {
		return nil, err
	}
	return &Cipher{generic: g}, nil
}
