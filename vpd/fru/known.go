package fru

import (
	"encoding/json"
	"fmt"
	"strconv"

	"nvstore.dev/vpd/internal/spec"
)

// A number is a little-endian integer in a record.
type number struct {
	name   string
	size   int // bytes
	signed bool
}

// known: the records that consist of numbers (section 18). Names
// end with the unit; voltages count 10 mV, and where a record shares a byte
// among several things it is one number here.
var known = map[byte][]number{
	0x00: {
		{"capacity_w", 2, false}, {"peak_va", 2, false}, {"inrush_a", 1, false}, {"inrush_interval_ms", 1, false},
		{"input1_low_10mv", 2, true}, {"input1_high_10mv", 2, true}, {"input2_low_10mv", 2, true}, {"input2_high_10mv", 2, true},
		{"frequency_low_hz", 1, false}, {"frequency_high_hz", 1, false}, {"dropout_ms", 1, false}, {"flags", 1, false},
		{"peak_w_and_hold_up_s", 2, false}, {"combined_voltages", 1, false}, {"combined_w", 2, false}, {"tachometer_threshold_rps", 1, false},
	},
	0x01: {
		{"output", 1, false}, {"nominal_10mv", 2, true}, {"negative_deviation_10mv", 2, true}, {"positive_deviation_10mv", 2, true},
		{"ripple_mv", 2, false}, {"current_min_ma", 2, false}, {"current_max_ma", 2, false},
	},
	0x02: {
		{"output", 1, false}, {"nominal_10mv", 2, true}, {"voltage_min_10mv", 2, true}, {"voltage_max_10mv", 2, true},
		{"ripple_mv", 2, false}, {"current_min_ma", 2, false}, {"current_max_ma", 2, false},
	},
}

func (n number) limits() (low, high int64) {
	bits := 8 * n.size
	if n.signed {
		return -1 << (bits - 1), 1<<(bits-1) - 1
	}
	return 0, 1<<bits - 1
}

// buildNumbers makes the data of a known record, each of whose numbers must be
// there: 0 is a value, and often not the one for "unspecified".
func buildNumbers(path string, typ byte, raw json.RawMessage) ([]byte, error) {
	list, ok := known[typ]
	if !ok {
		return nil, spec.Errorf(path, "only types 0x00 to 0x02 have them; write data instead")
	}
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, n := range list {
		names = append(names, n.name)
	}
	if err := o.Only(path, names...); err != nil {
		return nil, err
	}
	var out []byte
	for _, n := range list {
		path := spec.Join(path, n.name)
		raw, ok := o.Get(n.name)
		if !ok {
			return nil, spec.Errorf(path, "missing")
		}
		low, high := n.limits()
		v, err := integer(path, raw)
		if err != nil || v < low || v > high {
			return nil, spec.Errorf(path, "want an integer from %d to %d", low, high)
		}
		for i := range n.size {
			out = append(out, byte(v>>(8*i)))
		}
	}
	return out, nil
}

// integer reads a number that may be negative, or a string as spec.Uint does.
func integer(path string, raw json.RawMessage) (int64, error) {
	if len(raw) > 0 && raw[0] == '-' {
		return strconv.ParseInt(string(raw), 10, 64)
	}
	v, err := spec.Uint(path, raw, 1<<32-1)
	return int64(v), err
}

// numbers is the text form of a known record's data.
func numbers(list []number, data []byte) spec.Object {
	var o spec.Object
	for _, n := range list {
		var v int64
		for i := range n.size {
			v |= int64(data[i]) << (8 * i)
		}
		if _, high := n.limits(); v > high {
			v -= 1 << (8 * n.size)
		}
		switch n.name {
		case "flags", "output", "combined_voltages", "peak_w_and_hold_up_s":
			o.Add(n.name, fmt.Sprintf("0x%0*x", 2*n.size, v))
		default:
			o.Add(n.name, v)
		}
		data = data[n.size:]
	}
	return o
}
