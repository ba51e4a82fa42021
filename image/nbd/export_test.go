package nbd

// KeyOf is what nothing else shows of a key.
func KeyOf(k *PSK) []byte { return k.key }
