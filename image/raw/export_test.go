package raw

// OS is what a test can replace of the operating system.
type OS = file

// ReplaceOS puts wrap(os) between d and the operating system.
func (d *Device) ReplaceOS(wrap func(OS) OS) { d.f = wrap(d.f) }
