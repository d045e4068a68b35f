-- Where snapshots are. PREFIX:here:CHAIN and PREFIX:arriving:CHAIN have nodes by when that was noted; a note counts
-- unless it is older than PREFIX:noted says for its node.
-- include: stamp

local function here_key(prefix, chain)
  return prefix .. ':here:' .. chain
end

local function arriving_key(prefix, chain)
  return prefix .. ':arriving:' .. chain
end

local function noted_key(prefix)
  return prefix .. ':noted'
end

local function ops_key(prefix, node)
  return prefix .. ':ops:' .. node
end

-- Return milliseconds since the Unix epoch, to the microsecond, as digits: two scripts in one millisecond are told
-- apart, and a double holds it.
local function now_ms_exact()
  local us = now_us()
  return string.sub(us, 1, -4) .. '.' .. string.sub(us, -3)
end
