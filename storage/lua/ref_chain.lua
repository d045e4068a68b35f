-- Read a ref and all below it.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] ref ID
-- return  {'ok', {state, …}} with the given ref first and the lowest last, or {'missing', ID}
-- include: ref
local states = {}
local id = ARGV[1]
while id do
  local value = redis.call('GET', KEYS[1] .. ':ref:' .. id)
  if not value then
    return {'missing', id}
  end
  states[#states + 1] = ref_state(KEYS[1], value)
  id = cmsgpack.unpack(value)[3].parent
end
return {'ok', states}
